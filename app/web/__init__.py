"""HTTP plumbing shared by all endpoints."""
