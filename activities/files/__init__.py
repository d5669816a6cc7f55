"""What the file tools do with files: parts that fit into a result, edits, searches."""
