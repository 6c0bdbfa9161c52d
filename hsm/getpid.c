//go:build cgo && linux

// The modules we load ask for the process's ID again and again, to notice a fork: SoftHSM in
// each C_ function, OpenSSL under it at each draw of its generator, three times for one
// C_EncryptInit and C_Encrypt. The C library asks the kernel each time. Where entering the
// kernel is dear (1 us in some virtual machines) that was half of what a key costs in the HSM.
//
// This getpid takes the place of the C library's for all that is loaded into the process. It
// remembers the answer, as the C library itself did until glibc 2.25, and a child that is
// forked remembers its own: so a module still notices. Only a child that was made by a bare
// clone(2) and goes on into a module would be told its parent's; nobody makes one.
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

static pid_t self;

static void remember(void) { self = (pid_t)syscall(SYS_getpid); }

__attribute__((constructor)) static void begin(void) {
	if (pthread_atfork(NULL, NULL, remember) == 0) remember(); // otherwise getpid asks, as ever
}

pid_t getpid(void) { return self != 0 ? self : (pid_t)syscall(SYS_getpid); }
