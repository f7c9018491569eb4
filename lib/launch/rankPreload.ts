// Loaded before the script in every rank that `viaduct run` starts: an error that ends the rank reaches the launcher.
import { writeErrorFileWhenUncaught } from '../base/errorFile.js'

writeErrorFileWhenUncaught()
