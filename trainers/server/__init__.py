"""The server of a federation: who trains, what each is sent, and what becomes of what comes back. It knows no Trainer."""
