"""Pages for a browser; every `*_page.py` here is found at start-up."""
