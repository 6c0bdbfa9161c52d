// A PKCS#11 module that tells what it is told by getpid: C_GenerateRandom answers with six
// ints: getpid here and the kernel's word for it, the same of a child that it forks, and the
// same of a child of a bare clone(2), which getpid is not told of.
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

typedef unsigned long num;
struct functions { unsigned char version[2]; void *at[68]; };

static void ask(int told[2]) { told[0] = getpid(), told[1] = (int)syscall(SYS_getpid); }

static num tell(num session, int *out, num len) {
	(void)session;
	if (len != 6 * sizeof *out) return 5; // CKR_GENERAL_ERROR
	ask(out);
	for (int i = 2; i < 6; i += 2) {
		int ends[2];
		if (pipe(ends) != 0) return 5;
		pid_t child = i == 2 ? fork() : (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
		if (child == 0) {
			ask(out + i);
			_exit(write(ends[1], out + i, 2 * sizeof *out) != 2 * sizeof *out);
		}
		close(ends[1]); // a child that dies ends the reading
		int ok = child > 0 && read(ends[0], out + i, 2 * sizeof *out) == 2 * sizeof *out;
		close(ends[0]);
		if (child > 0) waitpid(child, NULL, 0);
		if (!ok) return 5;
	}
	return 0;
}

static struct functions functions = {{2, 40}, {0}};

num C_GetFunctionList(struct functions **list) {
	functions.at[64] = (void *)tell;
	*list = &functions;
	return 0;
}
