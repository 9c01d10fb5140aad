/* The floor: one container launched with the system calls that Insula's zygote makes, in C, and nothing else.
 *
 *   twin LOWER SCRATCH CGROUP        prints the milliseconds from before the first call until the program's end
 *
 * User, mount, pid, network, ipc, uts and cgroup namespaces; three control groups with limits; an overlay of LOWER
 * and SCRATCH/{upper,work}; /proc, /sys, /dev, /dev/pts, /dev/shm; pivot_root; masked and read-only paths; Docker's
 * default capabilities; no_new_privs; a seccomp filter; execve of /bin/true. Cleaning up is not in the time.
 * Works with version 1 and 2 control groups. Any failure ends it with a line that says where.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define IDS "0 1500000000 65536\n"
#define DEFAULT_CAPS 0x00000000a80425fbULL
#define CHECK(call) do { if ((call) < 0) { perror(#call); _exit(1); } } while (0)

static const char *const masked[] = {"/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug"};
static const char *const read_only[] = {"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"};
static const struct { const char *name; int major, minor; } devices[] = {
    {"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}};
static const struct { const char *name, *limit, *value; } controllers[] = {
    {"pids", "pids.max", "4096"},
    {"memory", "memory.limit_in_bytes", "536870912"},
    {"cpu", "cpu.cfs_quota_us", "100000"}};
static const int refused[] = {
    SYS_acct, SYS_add_key, SYS_bpf, SYS_clock_settime, SYS_delete_module, SYS_fanotify_init, SYS_finit_module,
    SYS_get_mempolicy, SYS_init_module, SYS_ioperm, SYS_iopl, SYS_kexec_load, SYS_keyctl, SYS_lookup_dcookie,
    SYS_mbind, SYS_mount, SYS_move_pages, SYS_open_by_handle_at, SYS_perf_event_open, SYS_pivot_root, SYS_quotactl,
    SYS_reboot, SYS_request_key, SYS_set_mempolicy, SYS_setns, SYS_settimeofday, SYS_swapoff, SYS_swapon,
    SYS_sysfs, SYS_umount2, SYS_unshare, SYS_uselib, SYS_userfaultfd, SYS_ustat, SYS_vhangup};
#define COUNT(array) (sizeof(array) / sizeof *(array))

static void put(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    CHECK(fd);
    CHECK(write(fd, text, strlen(text)));
    close(fd);
}

static void filter(void) {
    struct sock_filter code[8 + 2 * COUNT(refused)];
    size_t n = 0;
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch));
    code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (size_t i = 0; i < COUNT(refused); i++) {
        code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, refused[i], 0, 1);
        code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM);
    }
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {.len = n, .filter = code};
    CHECK(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program));
}

static void capabilities(void) {
    for (int cap = 0; cap <= 40; cap++)
        if (!(DEFAULT_CAPS >> cap & 1))
            prctl(PR_CAPBSET_DROP, cap);
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {{0}};
    data[0].effective = data[0].permitted = (uint32_t)DEFAULT_CAPS;
    CHECK(syscall(SYS_capset, &head, data));
}

static int overlay(const char *lower, const char *scratch) {
    char path[4096];
    int fs = fsopen("overlay", FSOPEN_CLOEXEC);
    CHECK(fs);
    CHECK(fsconfig(fs, FSCONFIG_SET_STRING, "lowerdir", lower, 0));
    snprintf(path, sizeof path, "%s/upper", scratch);
    CHECK(fsconfig(fs, FSCONFIG_SET_STRING, "upperdir", path, 0));
    snprintf(path, sizeof path, "%s/work", scratch);
    CHECK(fsconfig(fs, FSCONFIG_SET_STRING, "workdir", path, 0));
    CHECK(fsconfig(fs, FSCONFIG_SET_FLAG, "volatile", NULL, 0));
    CHECK(fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0));
    int mount = fsmount(fs, FSMOUNT_CLOEXEC, 0);
    CHECK(mount);
    close(fs);
    return mount;
}

static int device_tree(void) {
    int fs = fsopen("tmpfs", FSOPEN_CLOEXEC);
    CHECK(fs);
    CHECK(fsconfig(fs, FSCONFIG_SET_STRING, "mode", "755", 0));
    CHECK(fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0));
    int mount = fsmount(fs, FSMOUNT_CLOEXEC, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC);
    CHECK(mount);
    close(fs);
    umask(0);
    for (size_t i = 0; i < COUNT(devices); i++)
        CHECK(mknodat(mount, devices[i].name, S_IFCHR | 0666, makedev(devices[i].major, devices[i].minor)));
    CHECK(mkdirat(mount, "pts", 0755));
    CHECK(mkdirat(mount, "shm", 01777));
    return mount;
}

static void child(int go, int root, int dev, const int *tasks, int groups) {
    char byte;
    CHECK(read(go, &byte, 1));
    for (int i = 0; i < groups; i++)
        CHECK(write(tasks[i], "0", 1));
    CHECK(unshare(CLONE_NEWCGROUP));
    CHECK(setsid());
    CHECK(setresgid(0, 0, 0));
    CHECK(setresuid(0, 0, 0));
    CHECK(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL));
    CHECK(move_mount(root, "", AT_FDCWD, "/tmp", MOVE_MOUNT_F_EMPTY_PATH));
    CHECK(chdir("/tmp"));
    CHECK(mount("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL));
    CHECK(mount("sysfs", "sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY, NULL));
    CHECK(move_mount(dev, "", AT_FDCWD, "dev", MOVE_MOUNT_F_EMPTY_PATH));
    CHECK(mount("devpts", "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"));
    CHECK(mount("shm", "dev/shm", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=1777,size=65536k"));
    CHECK(syscall(SYS_pivot_root, ".", "."));
    CHECK(umount2(".", MNT_DETACH));
    CHECK(chdir("/"));
    for (size_t i = 0; i < COUNT(masked); i++)
        if (mount("/dev/null", masked[i], NULL, MS_BIND, NULL) < 0 && errno != ENOENT)
            CHECK(-1);
    for (size_t i = 0; i < COUNT(read_only); i++) {
        if (mount(read_only[i], read_only[i], NULL, MS_BIND | MS_REC, NULL) < 0)
            continue;
        CHECK(mount(NULL, read_only[i], NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL));
    }
    CHECK(sethostname("twin", 4));
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    capabilities();
    CHECK(close_range(3, ~0U, CLOSE_RANGE_CLOEXEC));
    filter();
    execl("/bin/true", "true", NULL);
    perror("execve");
    _exit(127);
}

static int enter_groups(const char *name, int *tasks, int create) {
    char path[4096];
    int count = 0;
    for (size_t i = 0; i < COUNT(controllers); i++) {
        snprintf(path, sizeof path, "/sys/fs/cgroup/%s/%s", controllers[i].name, name);
        if (!create) {
            rmdir(path);
            continue;
        }
        if (mkdir(path, 0755) < 0) {
            if (errno == ENOENT)
                continue; /* version 2: below */
            CHECK(-1);
        }
        size_t end = strlen(path);
        snprintf(path + end, sizeof path - end, "/%s", controllers[i].limit);
        put(path, controllers[i].value);
        snprintf(path + end, sizeof path - end, "/tasks");
        CHECK(tasks[count++] = open(path, O_WRONLY | O_CLOEXEC));
    }
    if (count == 0) {
        snprintf(path, sizeof path, "/sys/fs/cgroup/%s", name);
        if (!create) {
            rmdir(path);
            return 0;
        }
        CHECK(mkdir(path, 0755));
        size_t end = strlen(path);
        snprintf(path + end, sizeof path - end, "/cgroup.procs");
        CHECK(tasks[count++] = open(path, O_WRONLY | O_CLOEXEC));
    }
    return count;
}

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: twin LOWER SCRATCH CGROUP\n");
        return 2;
    }
    struct timespec start, end;
    int tasks[4], go[2], status, pidfd = -1;
    char path[64];
    clock_gettime(CLOCK_MONOTONIC, &start);
    int groups = enter_groups(argv[3], tasks, 1);
    int root = overlay(argv[1], argv[2]), dev = device_tree();
    CHECK(pipe2(go, O_CLOEXEC));
    struct clone_args args = {
        .flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_PIDFD,
        .pidfd = (uintptr_t)&pidfd,
        .exit_signal = SIGCHLD};
    pid_t pid = syscall(SYS_clone3, &args, sizeof args);
    CHECK(pid);
    if (pid == 0)
        child(go[0], root, dev, tasks, groups);
    snprintf(path, sizeof path, "/proc/%d/uid_map", pid);
    put(path, IDS);
    snprintf(path, sizeof path, "/proc/%d/gid_map", pid);
    put(path, IDS);
    CHECK(write(go[1], "g", 1));
    CHECK(waitpid(pid, &status, 0));
    clock_gettime(CLOCK_MONOTONIC, &end);
    close(root);
    enter_groups(argv[3], tasks, 0);
    if (status != 0) {
        fprintf(stderr, "the container ended with status %d\n", status);
        return 1;
    }
    printf("%.3f\n", (end.tv_sec - start.tv_sec) * 1e3 + (end.tv_nsec - start.tv_nsec) / 1e6);
    return 0;
}
