"""The spec: its model, its reader with places, and which file a name means."""
