"""Limit what one endpoint is sent: rates that are configured, stated or learned, and a window."""
