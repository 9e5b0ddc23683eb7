"""Peers, measured on the same checkpoints and data in an environment of their own (`requirements.txt`); nothing else imports them."""
