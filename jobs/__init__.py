"""What runs on the cluster: jobs built on the library, and the commands that start them."""
