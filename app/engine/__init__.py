"""The process that answers queries, and the client that feeds it."""
