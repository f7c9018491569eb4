// Loaded before the script in every rank that `viaduct run` starts: an error that ends the rank reaches the
// launcher, and signs of life do from here on.
import { writeErrorFileWhenUncaught } from '../base/errorFile.js'
import { startHeartbeat } from '../parallel/heartbeat.js'

writeErrorFileWhenUncaught()
startHeartbeat()
