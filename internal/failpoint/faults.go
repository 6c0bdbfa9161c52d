package failpoint

// FaultsFile is the environment variable that names a file with what is wrong with
// this process, a line for each thing. A test may replace the file while the process
// runs; a file that is not there says that nothing is wrong.
//
//	NAME DURATION    whoever comes to that failpoint, or asks that organ, waits so long
//	NAME error       that organ fails
//	clock DURATION   the clock is ahead by so much, or behind
//	audit off        no event is recorded: what is measured is what the audit costs
const FaultsFile = "KME_FAULTS"

// HSM is the organ that Fault knows: whatever is asked of the token.
const HSM = "hsm"
