"""Who may do what: clients, how they prove who they are, and what they are allowed."""
