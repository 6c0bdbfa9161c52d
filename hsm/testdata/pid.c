// A PKCS#11 module that tells what it is told by getpid: C_GenerateRandom answers with five
// ints: getpid here, the kernel's word for it, the same two of a child that it forks, and
// whether getpid is another one than the C library's.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

typedef unsigned long num;
struct functions { unsigned char version[2]; void *at[68]; };

static num tell(num session, int *out, num len) {
	int ends[2], told[2];
	(void)session;
	if (len != 5 * sizeof *out || pipe(ends) != 0) return 5; // CKR_GENERAL_ERROR
	out[0] = getpid(), out[1] = (int)syscall(SYS_getpid);
	pid_t child = fork();
	if (child == 0) {
		told[0] = getpid(), told[1] = (int)syscall(SYS_getpid);
		_exit(write(ends[1], told, sizeof told) != sizeof told);
	}
	num bad = child < 0 || read(ends[0], out + 2, sizeof told) != sizeof told;
	close(ends[0]), close(ends[1]);
	if (child > 0) waitpid(child, NULL, 0);
	void *libc = dlopen("libc.so.6", RTLD_LAZY);
	out[4] = libc != NULL && dlsym(libc, "getpid") != (void *)getpid;
	return bad ? 5 : 0;
}

static struct functions functions = {{2, 40}, {0}};

num C_GetFunctionList(struct functions **list) {
	functions.at[64] = (void *)tell;
	*list = &functions;
	return 0;
}
