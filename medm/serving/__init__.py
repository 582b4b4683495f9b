"""Serving: HTTP and web page, the layer between evaluation and the command line. Empty as yet."""
