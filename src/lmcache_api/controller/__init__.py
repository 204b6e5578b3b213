"""Endpoints; every `*_api.py` here is found at start-up."""
