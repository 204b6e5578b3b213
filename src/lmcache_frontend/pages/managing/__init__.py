"""The frontend's own list of nodes: each entry with its source, tests of connections, import and export of a file."""
