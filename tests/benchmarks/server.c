/* A local OpenAI-compatible chat server that is much faster than the clients measured against it,
 * and the load that measures its own ceiling. Not here: a portable form (slow_server.py).
 *
 *   server [LATENCY_MS]                      serve; the port goes to stdout, ends when stdin closes
 *   server --load PORT CONNECTIONS SECONDS   ask that server; requests per second go to stdout
 *
 * One thread, one epoll. Each connection has at most one request under way: clients that pipeline
 * are not supported. Linux only.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define MAX_FDS 20000
#define MAX_EVENTS 1024
#define MAX_REQUEST (64 << 20)

/* Must match slow_server.py. */
static const char ANSWER[] =
    "{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion\",\"created\":1700000000,"
    "\"model\":\"gpt-4o-mini\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":"
    "\"[[ ## answer ## ]]\\nParis\\n\\n[[ ## completed ## ]]\",\"refusal\":null},"
    "\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":120,"
    "\"completion_tokens\":20,\"total_tokens\":140},\"system_fingerprint\":\"fp_bench\"}";
static const char REFUSAL[] =
    "{\"error\":{\"message\":\"only POST /v1/chat/completions with a Content-Length\","
    "\"type\":\"invalid_request_error\",\"param\":null,\"code\":null}}";
static const char TARGET[] = "POST /v1/chat/completions ";

enum { READING, WAITING, CLOSING };

struct connection {
    char *data;
    size_t size, room, body_at, body_size;
    uint32_t generation; /* tells a late answer that its connection is gone and the fd in new use */
    int state, known, keep, found;
};

struct late {
    int fd;
    uint32_t generation;
    int64_t due_ns;
};

static struct connection connections[MAX_FDS];
/* All requests wait equally long, so the queue of timers is a ring in the order of arrival. */
static struct late ring[MAX_FDS];
static size_t ring_head, ring_count;
static int64_t latency_ns;
static int poll_fd, timer_fd;
static char good[2048], bad[2048];
static size_t good_size, bad_size;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void allow_many_files(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max < MAX_FDS ? limit.rlim_max : MAX_FDS;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

static void watch(int fd, uint32_t events) {
    struct epoll_event event = {.events = events, .data.fd = fd};
    if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &event) < 0 && errno != EPERM) die("epoll_ctl");
}

static void drop(int fd) {
    struct connection *c = &connections[fd];
    c->generation++;
    c->state = READING;
    c->size = c->known = 0;
    if (c->room > 65536) {
        free(c->data);
        c->data = NULL;
        c->room = 0;
    }
    close(fd);
}

static void set_timer(void) {
    struct itimerspec when = {0};
    if (ring_count) {
        when.it_value.tv_sec = ring[ring_head].due_ns / 1000000000;
        when.it_value.tv_nsec = ring[ring_head].due_ns % 1000000000;
    }
    timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
}

static void answer(int fd) {
    struct connection *c = &connections[fd];
    const char *text = c->found ? good : bad;
    size_t size = c->found ? good_size : bad_size;
    /* An answer is far below what an empty send buffer takes, so a short write means a dead peer. */
    if (send(fd, text, size, MSG_NOSIGNAL) != (ssize_t)size || !c->keep) {
        drop(fd);
        return;
    }
    c->size = c->known = 0;
    c->state = READING;
}

static int has_word(const char *headers, const char *name, const char *word) {
    const char *line = strcasestr(headers, name);
    if (!line) return 0;
    const char *stop = strstr(line + 2, "\r\n"), *found = strcasestr(line, word);
    return found && (!stop || found < stop);
}

/* Read the headers once they are complete; 0 while they are not. */
static int read_headers(struct connection *c) {
    char *end = memmem(c->data, c->size, "\r\n\r\n", 4);
    if (!end) return 0;
    *end = 0; /* so that no search runs on into the body */
    char *length = strcasestr(c->data, "\r\ncontent-length:");
    c->body_at = (size_t)(end - c->data) + 4;
    c->body_size = length ? strtoul(length + 17, NULL, 10) : 0;
    c->found = length && !strncmp(c->data, TARGET, sizeof TARGET - 1);
    c->keep = c->found && !has_word(c->data, "\r\nconnection:", "close");
    c->known = 1;
    return 1;
}

static void receive(int fd) {
    struct connection *c = &connections[fd];
    for (;;) {
        if (c->size == c->room) {
            c->room = c->room ? c->room * 2 : 4096;
            c->data = realloc(c->data, c->room);
            if (!c->data) die("realloc");
        }
        size_t space = c->room - c->size;
        ssize_t got = recv(fd, c->data + c->size, space, 0);
        if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) {
            drop(fd);
            return;
        }
        if (got < 0) {
            if (errno == EINTR) continue;
            break;
        }
        c->size += (size_t)got;
        if (c->size > MAX_REQUEST || c->state == WAITING) { /* too long, or pipelined */
            drop(fd);
            return;
        }
        if ((size_t)got < space) break; /* nothing is left; the level-triggered epoll would tell */
    }
    if (!c->known && !read_headers(c)) return;
    if (c->size < c->body_at + c->body_size) return;
    if (!latency_ns || !c->found) {
        answer(fd);
        return;
    }
    c->state = WAITING;
    if (ring_count == MAX_FDS) die("too many requests wait");
    ring[(ring_head + ring_count++) % MAX_FDS] =
        (struct late){fd, c->generation, now_ns() + latency_ns};
    if (ring_count == 1) set_timer();
}

static void answer_late(void) {
    uint64_t fired;
    if (read(timer_fd, &fired, sizeof fired) < 0 && errno != EAGAIN) die("timer");
    int64_t now = now_ns();
    while (ring_count && ring[ring_head].due_ns <= now) {
        struct late next = ring[ring_head];
        ring_head = (ring_head + 1) % MAX_FDS;
        ring_count--;
        if (connections[next.fd].generation == next.generation) answer(next.fd);
    }
    set_timer();
}

static size_t response(char *out, size_t room, const char *status, const char *body) {
    return (size_t)snprintf(out, room,
                            "HTTP/1.1 %s\r\nContent-Type: application/json\r\n"
                            "Content-Length: %zu\r\n\r\n%s",
                            status, strlen(body), body);
}

static int serve(void) {
    int on = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t size = sizeof address;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, size) < 0) die("bind");
    if (listen(listener, 8192) < 0) die("listen");
    getsockname(listener, (struct sockaddr *)&address, &size);
    good_size = response(good, sizeof good, "200 OK", ANSWER);
    bad_size = response(bad, sizeof bad, "404 Not Found", REFUSAL);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    watch(listener, EPOLLIN);
    watch(timer_fd, EPOLLIN);
    watch(STDIN_FILENO, EPOLLIN);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    struct epoll_event events[MAX_EVENTS];
    for (;;) {
        int count = epoll_wait(poll_fd, events, MAX_EVENTS, -1);
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd;
            if (fd == STDIN_FILENO) {
                char text[256];
                if (read(STDIN_FILENO, text, sizeof text) <= 0) return 0;
            } else if (fd == timer_fd) {
                answer_late();
            } else if (fd == listener) {
                int client;
                while ((client = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    if (client >= MAX_FDS) {
                        close(client);
                        continue;
                    }
                    setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                    watch(client, EPOLLIN);
                }
            } else {
                receive(fd);
            }
        }
    }
}

/* The load: every connection sends one request, reads the whole answer, and sends the next. */
static int load(int port, int count, double seconds) {
    char request[1024], body[512], text[8192];
    memset(body, 'x', sizeof body);
    int head = snprintf(request, sizeof request,
                        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                        "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n",
                        sizeof body);
    memcpy(request + head, body, sizeof body);
    ssize_t size = head + (ssize_t)sizeof body;
    size_t whole = response(good, sizeof good, "200 OK", ANSWER);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int i = 0; i < count; i++) {
        int on = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
        if (fd < 0 || fd >= MAX_FDS) die("socket");
        if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0) die("connect");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        watch(fd, EPOLLIN);
        if (send(fd, request, (size_t)size, MSG_NOSIGNAL) != size) die("send");
    }
    int64_t start = now_ns(), end = start + (int64_t)(seconds * 1e9), now = start;
    long answers = 0;
    struct epoll_event events[MAX_EVENTS];
    while (now < end) {
        int ready = epoll_wait(poll_fd, events, MAX_EVENTS, 100);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            struct connection *c = &connections[fd];
            ssize_t got = recv(fd, text, sizeof text, 0);
            if (got <= 0) die("recv");
            c->size += (size_t)got;
            if (c->size < whole) continue;
            c->size = 0;
            answers++;
            if (send(fd, request, (size_t)size, MSG_NOSIGNAL) != size) die("send");
        }
        now = now_ns();
    }
    printf("%.0f\n", (double)answers / ((double)(now - start) / 1e9));
    return 0;
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    allow_many_files();
    poll_fd = epoll_create1(0);
    if (argc == 5 && !strcmp(argv[1], "--load"))
        return load(atoi(argv[2]), atoi(argv[3]), atof(argv[4]));
    latency_ns = argc > 1 ? (int64_t)(atof(argv[1]) * 1e6) : 0;
    return serve();
}
