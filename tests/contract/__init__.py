"""What LMCache's own servers answered, recorded, and how an answer of ours is held against it."""
