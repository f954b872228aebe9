"""Exchange with other libraries and the Hub."""
