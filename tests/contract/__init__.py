"""What everything behind one seam must do alike."""
