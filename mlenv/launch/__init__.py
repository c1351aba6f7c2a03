"""Where an environment, a kernel or a build step runs."""
