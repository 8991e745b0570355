"""What every key of the YAML files means, taken from the code that defines and reads it."""
