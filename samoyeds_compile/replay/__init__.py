"""Running a region and its replacement on small random inputs."""
