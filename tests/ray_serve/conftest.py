"""The tests of this folder run with TEST_SERVER=ray, in one process with those of tests/service (`make test-ray`)."""

import os

collect_ignore_glob = [] if os.environ.get("TEST_SERVER") == "ray" else ["test_cluster_*.py"]
