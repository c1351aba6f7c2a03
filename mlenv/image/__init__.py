"""Images: unpacked trees in a store, the builds that make them, and the OCI layouts they are saved as."""
