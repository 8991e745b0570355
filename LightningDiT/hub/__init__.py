"""Where weights lie: published repositories, folders like them, and the bundled model."""
