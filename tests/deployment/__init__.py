"""Tests of the files in deploy/, docker-compose.yml, the Dockerfile and the configurations of docs/deployment.md."""
