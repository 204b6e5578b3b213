"""The proxy: which target a request means, whether it may go there, and how it gets there and back."""
