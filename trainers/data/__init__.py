"""Who has what: how data is split among clients, prepared for them, and looked at."""
