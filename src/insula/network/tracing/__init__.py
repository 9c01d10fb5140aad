"""`insula trace`: one packet, followed through what is installed and explained by the intent."""
