"""Models made smaller, or taken elsewhere: quantised weights, exported graphs."""
