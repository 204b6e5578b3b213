"""The last day of every node's main series, in memory, and what has happened lately."""
