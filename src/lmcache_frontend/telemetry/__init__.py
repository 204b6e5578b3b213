"""What the frontend learns about its nodes by asking them."""
