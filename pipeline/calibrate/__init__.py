"""What is measured on samples without training: statistics, layer inputs, reconstruction, batch norm."""
