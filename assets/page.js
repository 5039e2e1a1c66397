// The page is useful without this script.
