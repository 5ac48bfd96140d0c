"""The documentation as HTML pages."""
