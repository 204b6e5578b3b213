"""What both servers speak: configuration, addresses, route discovery, refusals. Imports neither of them."""
