"""The frontend of an LMCache cluster: its dashboard, and a proxy to every component's internal API."""
