/* PID 1 of a container: starts the program, passes signals on, reaps orphans, ends with the program's status.
 *
 * usage: mlenv-init CHANNEL_FD PROGRAM ARG0 [ARG...]
 *        mlenv-exec CHANNEL_FD PROGRAM ARG0 [ARG...]
 *
 * As mlenv-exec it becomes the program in place. An image's `#!/proc/self/exe` then leads to this sealed file
 * and never to the host's interpreter (CVE-2019-5736).
 *
 * CHANNEL_FD is a SOCK_SEQPACKET socket; it closes when the program is executed. An execve that fails is
 * reported as "init-error ERRNO PROGRAM". Built static, run from a sealed memory file.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static void report(int channel, int number, const char *program)
{
	char text[4096];
	int length = snprintf(text, sizeof text, "init-error %d %s", number, program);

	if (length >= (int)sizeof text)
		length = sizeof text - 1;
	send(channel, text, length, MSG_NOSIGNAL);
}

static void become(int channel, char **argv)
{
	int number;

	fcntl(channel, F_SETFD, FD_CLOEXEC);
	execve(argv[2], argv + 3, environ);
	number = errno;
	report(channel, number, argv[2]);
	_exit(number == ENOENT || number == ENOTDIR ? 127 : 126);
}

static void run(int channel, char **argv, const sigset_t *signals)
{
	int terminal = isatty(0);

	/* Own process group, in the foreground where there is a terminal: job control works as after login. */
	setpgid(0, 0);
	if (terminal) {
		signal(SIGTTOU, SIG_IGN);
		tcsetpgrp(0, getpid());
		signal(SIGTTOU, SIG_DFL);
	}
	sigprocmask(SIG_UNBLOCK, signals, NULL);
	become(channel, argv);
}

static int reap(pid_t child)
{
	int status;
	pid_t ended;

	while ((ended = waitpid(-1, &status, WNOHANG)) > 0)
		if (ended == child)
			return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
	return -1;
}

int main(int argc, char **argv)
{
	sigset_t signals;
	siginfo_t received;
	pid_t child;
	int channel, status;

	if (argc < 4)
		return 125;
	channel = atoi(argv[1]);
	/* The program must not look into us: what we hold open is not its own. */
	prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
	if (strcmp(argv[0], "mlenv-exec") == 0)
		become(channel, argv);
	prctl(PR_SET_NAME, "mlenv-init", 0, 0, 0);
	sigfillset(&signals);
	sigprocmask(SIG_SETMASK, &signals, NULL);
	child = fork();
	if (child < 0) {
		report(channel, errno, argv[2]);
		return 126;
	}
	if (child == 0)
		run(channel, argv, &signals);
	close(channel);
	for (;;) {
		int number = sigwaitinfo(&signals, &received);

		if (number == SIGCHLD) {
			status = reap(child);
			if (status >= 0)
				return status;
		} else if (number > 0 && number != SIGTTIN && number != SIGTTOU) {
			/* From the terminal the foreground group has it already (si_code SI_KERNEL). */
			if (received.si_code != SI_KERNEL)
				kill(child, number);
		}
	}
}
