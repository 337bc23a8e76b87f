/* bcc includes this; the program needs nothing from it. */
