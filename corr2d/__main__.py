"""Run the command line: `corr2d`, or `python -m corr2d`."""

from service.cli.main import app

if __name__ == "__main__":
    app()
