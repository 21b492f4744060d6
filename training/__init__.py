"""From public ICU data to a tuned model and the bundle that the service loads."""
