"""Run the command line: `python -m service`."""

from service.cli.main import app

if __name__ == "__main__":
    app()
