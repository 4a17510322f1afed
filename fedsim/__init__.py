"""fedsim simulates federated learning: server strategies, simulated clients, engines that run them."""
