"""Tables and sessions; SQL lives in the domains' repositories."""
