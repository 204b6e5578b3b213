"""What every node counts, as one exposition, and what the frontend itself counts."""
