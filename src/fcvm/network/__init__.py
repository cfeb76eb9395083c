"""A VM's network: what is asked for (``spec``), setting it up and its life (``attach``), and the parts of each mode."""
