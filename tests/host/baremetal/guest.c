/*
 * A guest without an operating system, for tests and measurements against a real Firecracker.
 *
 * It boots in a millisecond, needs 32 MiB, and runs on any /dev/kvm, also on one that cannot run a stock kernel. The
 * host tells it by virtio-vsock (port 52) what to do with its memory: fill pages with a pattern, check them, give them
 * to the balloon. So every page of a restored clone can be verified, and a clone can be asked whether it lives.
 *
 * A request is eight little-endian u64 (struct request), its answer one u64. Serial console: "BOOT", "READY", then "R"
 * after a snapshot was taken or loaded.
 *
 * It can also act the guest agent of a restored VM, as far as a supervisor and a client of `exec` can tell: it connects
 * to port 4999, says hello, takes the new identity and ends when it is told to; on port 4998 every command prints
 * "ready" and ends with 0. The messages are those of docs/architecture.md.
 *
 * Virtio over MMIO: OASIS VIRTIO 1.2, section 4.2; vsock 5.10; balloon 5.5. Firecracker puts the devices at 4 KiB
 * steps from the start of the gap below 4 GiB. Everything is polled: no interrupts, so that no controller needs to work.
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

enum { ECHO, FILL, CHECK, BALLOON, COUNTER, ON_RESET, HALT, ZEROED };

struct request {
    u64 op;
    u64 first;      /* page number */
    u64 count;      /* pages */
    u64 seed;       /* of the pattern */
    u64 multiplier; /* order of CHECK: i -> (i * multiplier + increment) & mask; 0: ascending */
    u64 increment;
    u64 mask;
    u64 argument;   /* ECHO: the answer; ON_RESET: enum on_reset */
};

enum on_reset { CONTINUE, STOP, STOP_AFTER_REQUEST, ACT_AGENT };

static u64 on_reset = CONTINUE;
static u64 counter; /* requests served since the boot: survives in a clone */

/* ---- serial console ------------------------------------------------------------------------------------------- */

static void print(const char *text)
{
    for (; *text; text++)
        __asm__ volatile("outb %0, %1" ::"a"(*text), "Nd"((u16)0x3f8));
}

static void halt(void)
{
    for (;;)
        __asm__ volatile("cli; hlt");
}

/* ---- memory --------------------------------------------------------------------------------------------------- */

#define PAGE 4096ul
#define GIB (1ul << 30)
#define MAPPED 8 /* GiB */

/* Firecracker maps the first GiB; map the first eight one to one, in 2 MiB pages, for the gap and what lies above. */
static u64 directories[MAPPED][512] __attribute__((aligned(4096)));

static void map_memory(void)
{
    u64 cr3;
    __asm__ volatile("mov %%cr3, %0" : "=r"(cr3));
    u64 *pml4 = (u64 *)(cr3 & ~0xffful);
    u64 *pdpt = (u64 *)(pml4[0] & 0xffffffffff000ul);
    for (u64 g = 0; g < MAPPED; g++) {
        for (u64 i = 0; i < 512; i++)
            directories[g][i] = (g * GIB + (i << 21)) | 0x83; /* present, writable, 2 MiB */
        pdpt[g] = (u64)directories[g] | 3;
    }
    __asm__ volatile("mov %0, %%cr3" ::"r"(cr3) : "memory");
}

/* The pattern: the first and the last word of a page depend on its number and the seed. */
static u64 pattern(u64 page, u64 seed)
{
    return (page * 2 + 1) * 0x9e3779b97f4a7c15ul ^ seed;
}

static void fill(u64 page, u64 seed)
{
    volatile u64 *word = (u64 *)(page * PAGE);
    word[0] = pattern(page, seed);
    word[511] = ~pattern(page, seed);
}

static u64 wrong(u64 page, u64 seed)
{
    volatile u64 *word = (u64 *)(page * PAGE);
    return word[0] != pattern(page, seed) || word[511] != ~pattern(page, seed);
}

static u64 not_zero(u64 page)
{
    volatile u64 *word = (u64 *)(page * PAGE);
    return word[0] != 0 || word[511] != 0;
}

/* ---- virtio over MMIO ------------------------------------------------------------------------------------------ */

#define SIZE 16 /* of every queue */

struct queue {
    struct { u64 address; u32 length; u16 flags, next; } descriptor[SIZE] __attribute__((aligned(16)));
    struct { u16 flags, index, ring[SIZE]; } available __attribute__((aligned(16)));
    volatile struct { u16 flags, index; struct { u32 id, length; } ring[SIZE]; } used __attribute__((aligned(16)));
    u16 seen; /* entries of the used ring that were taken */
};

static u32 read32(u64 address)
{
    return *(volatile u32 *)address;
}

static void write32(u64 address, u32 value)
{
    *(volatile u32 *)address = value;
}

static void write64(u64 address, u64 value)
{
    write32(address, value);
    write32(address + 4, value >> 32);
}

/* The MMIO window of the device of a type (19 vsock, 5 balloon); 0 when there is none. */
static u64 find_device(u32 type)
{
    static const u64 starts[] = {0xc0000000ul, 0xc0001000ul, 0xd0000000ul}; /* differs between versions */
    for (u64 s = 0; s < sizeof starts / sizeof *starts; s++)
        for (u64 n = 0; n < 20; n++) {
            u64 base = starts[s] + n * PAGE;
            if (read32(base) == 0x74726976 && read32(base + 8) == type)
                return base;
        }
    return 0;
}

/* Reset, then acknowledge and accept VIRTIO_F_VERSION_1 (bit 32) and nothing else. */
static void begin_setup(u64 device)
{
    write32(device + 0x70, 0);
    write32(device + 0x70, 1);
    write32(device + 0x70, 3);
    write32(device + 0x24, 0);
    write32(device + 0x20, 0);
    write32(device + 0x24, 1);
    write32(device + 0x20, 1);
    write32(device + 0x70, 11);
}

static void set_queue(u64 device, u32 number, struct queue *queue)
{
    write32(device + 0x30, number);
    write32(device + 0x38, SIZE);
    write64(device + 0x80, (u64)queue->descriptor);
    write64(device + 0x90, (u64)&queue->available);
    write64(device + 0xa0, (u64)&queue->used);
    write32(device + 0x44, 1);
}

static void end_setup(u64 device)
{
    write32(device + 0x70, 15);
}

static void offer(struct queue *queue, u16 id)
{
    queue->available.ring[queue->available.index % SIZE] = id;
    __asm__ volatile("mfence" ::: "memory");
    queue->available.index++;
    __asm__ volatile("mfence" ::: "memory");
}

static void notify(u64 device, u32 number)
{
    write32(device + 0x50, number);
}

/* The id of the next descriptor that the device has used; -1: none. */
static int take(struct queue *queue)
{
    if (queue->used.index == queue->seen)
        return -1;
    return queue->used.ring[queue->seen++ % SIZE].id;
}

/* ---- balloon --------------------------------------------------------------------------------------------------- */

static u64 balloon;
static struct queue inflate, deflate, statistics;
static u32 frames[256];

static void start_balloon(void)
{
    balloon = find_device(5);
    if (!balloon)
        return;
    begin_setup(balloon);
    set_queue(balloon, 0, &inflate);
    set_queue(balloon, 1, &deflate);
    set_queue(balloon, 2, &statistics);
    end_setup(balloon);
}

/* Hand pages to the host, which drops their content; returns how many. */
static u64 give(u64 first, u64 count)
{
    u64 done = 0;
    while (balloon && done < count) {
        u64 n = count - done < 256 ? count - done : 256;
        for (u64 i = 0; i < n; i++)
            frames[i] = first + done + i;
        inflate.descriptor[0].address = (u64)frames;
        inflate.descriptor[0].length = n * sizeof *frames;
        inflate.descriptor[0].flags = 0;
        offer(&inflate, 0);
        notify(balloon, 0);
        while (take(&inflate) < 0)
            __asm__ volatile("pause");
        done += n;
    }
    return done;
}

/* ---- vsock ----------------------------------------------------------------------------------------------------- */

#define PORT 52
#define CONTROL 4999 /* of the host */
#define SESSIONS 4998
#define OWN 1024 /* where our connection to CONTROL comes from */
#define HOST 2   /* context identifier */
#define GUEST 3
#define BUFFER 4608

enum { REQUEST = 1, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST };

struct header {
    u64 from_cid, to_cid;
    u32 from_port, to_port, length;
    u16 type, op;
    u32 flags, buffer, forwarded;
} __attribute__((packed));

static u64 vsock;
static struct queue receive, transmit, events;
static u8 received[SIZE][BUFFER] __attribute__((aligned(4096)));
static u8 sent[SIZE][BUFFER] __attribute__((aligned(4096)));
static u64 event[SIZE];
static u16 slot;

/* What the host may send us on a connection depends on how much we say that we have taken (5.10.6.3). */
static struct connection { u32 peer, port, taken; } connections[64];

static struct connection *find(struct header *in)
{
    for (u64 i = 0; i < 64; i++)
        if (connections[i].peer == in->from_port && connections[i].port == in->to_port)
            return &connections[i];
    return 0;
}

static void forget(struct header *in)
{
    struct connection *c = find(in);
    if (c)
        c->peer = c->port = 0;
}

static struct connection *remember(struct header *in)
{
    forget(in);
    for (u64 i = 0; i < 64; i++)
        if (!connections[i].peer) {
            connections[i] = (struct connection){in->from_port, in->to_port, 0};
            return &connections[i];
        }
    return 0;
}

static void start_vsock(void)
{
    vsock = find_device(19);
    if (!vsock)
        return;
    begin_setup(vsock);
    set_queue(vsock, 0, &receive);
    set_queue(vsock, 1, &transmit);
    set_queue(vsock, 2, &events);
    for (u16 i = 0; i < SIZE; i++) {
        receive.descriptor[i].address = (u64)received[i];
        receive.descriptor[i].length = BUFFER;
        receive.descriptor[i].flags = 2; /* the device writes */
        offer(&receive, i);
        events.descriptor[i].address = (u64)&event[i];
        events.descriptor[i].length = sizeof *event;
        events.descriptor[i].flags = 2;
        offer(&events, i);
    }
    end_setup(vsock);
    notify(vsock, 0);
    notify(vsock, 2);
}

static void send(struct header *to, u16 op, const void *data, u32 length)
{
    while ((u16)(transmit.available.index - transmit.used.index) >= SIZE)
        __asm__ volatile("pause");
    struct header *out = (struct header *)sent[slot];
    struct connection *c = find(to);
    *out = (struct header){
        .from_cid = GUEST, .to_cid = HOST, .from_port = to->to_port, .to_port = to->from_port,
        .length = length, .type = 1, .op = op, .buffer = 65536, .forwarded = c ? c->taken : 0,
    };
    for (u32 i = 0; i < length; i++)
        sent[slot][sizeof *out + i] = ((const u8 *)data)[i];
    transmit.descriptor[slot].address = (u64)out;
    transmit.descriptor[slot].length = sizeof *out + length;
    transmit.descriptor[slot].flags = 0;
    offer(&transmit, slot);
    slot = (slot + 1) % SIZE;
    notify(vsock, 1);
}

static u64 perform(struct request *r)
{
    u64 bad = 0, page = r->first;
    counter++;
    switch (r->op) {
    case ECHO:
        return r->argument;
    case FILL:
        for (u64 i = 0; i < r->count; i++)
            fill(r->first + i, r->seed);
        return r->count;
    case CHECK:
        for (u64 i = 0, at = 0; i < r->count; i++) {
            bad += wrong(r->first + at, r->seed);
            at = r->multiplier ? (at * r->multiplier + r->increment) & r->mask : at + 1;
        }
        return bad;
    case ZEROED:
        for (u64 i = 0; i < r->count; i++)
            bad += not_zero(page + i);
        return bad;
    case BALLOON:
        return give(r->first, r->count);
    case COUNTER:
        return counter;
    case ON_RESET:
        on_reset = r->argument;
        return 0;
    default:
        return ~0ul;
    }
}

/* ---- acting the agent ------------------------------------------------------------------------------------------ */

static struct header control = {.from_port = CONTROL, .to_port = OWN};
static struct header main_session; /* the container's own: who carries its output */
static int stopped;                /* the container has ended: whoever carries its output is told, now or later */

static u32 length_of(const char *text)
{
    u32 n = 0;
    while (text[n])
        n++;
    return n;
}

static int contains(const u8 *data, u32 length, const char *word)
{
    u32 n = length_of(word);
    for (u32 i = 0; i + n <= length; i++) {
        u32 k = 0;
        while (k < n && data[i + k] == (u8)word[k])
            k++;
        if (k == n)
            return 1;
    }
    return 0;
}

static void say(struct header *to, const char *line)
{
    send(to, RW, line, length_of(line));
}

static void frame(struct header *to, u8 type, const char *payload)
{
    u8 data[256];
    u32 n = length_of(payload);
    data[0] = type;
    data[1] = data[2] = data[3] = 0;
    data[4] = n;
    for (u32 i = 0; i < n; i++)
        data[5 + i] = payload[i];
    send(to, RW, data, 5 + n);
}

static void on_control(const u8 *data, u32 length)
{
    if (contains(data, length, "\"restored\""))
        say(&control, "{\"type\":\"ready\"}\n");
    if (contains(data, length, "\"stop\"")) {
        say(&control, "{\"type\":\"exit\",\"code\":143,\"oom\":false}\n");
        stopped = 1;
        if (main_session.to_port)
            frame(&main_session, 8, "{\"code\":143}");
    }
}

static void on_session(struct header *in, const u8 *data, u32 length)
{
    if (contains(data, length, "\"resume\"")) {
        main_session = *in;
        say(in, "{\"session\":\"main\",\"received\":0,\"from\":0}\n");
        frame(in, 5, "hello from the container\n");
        if (stopped)
            frame(in, 8, "{\"code\":143}");
    } else if (contains(data, length, "\"open\"")) {
        say(in, "{\"session\":\"1\",\"received\":0}\n");
        frame(in, 7, "{\"pid\":1}");
        frame(in, 5, "ready\n");
        frame(in, 8, "{\"code\":0}");
    } /* else: acknowledgements */
}

/* ---- packets from the host ------------------------------------------------------------------------------------- */

/* One packet; a request always comes in one piece. */
static void handle(struct header *in)
{
    u8 *data = (u8 *)(in + 1);
    struct connection *c = find(in);
    switch (in->op) {
    case REQUEST:
        if (in->to_port == PORT || in->to_port == SESSIONS) {
            remember(in);
            send(in, RESPONSE, 0, 0);
        } else
            send(in, RST, 0, 0);
        break;
    case RESPONSE:
        say(&control, "{\"type\":\"hello\",\"protocol\":1,\"agent\":\"0\",\"state\":{\"phase\":\"running\"}}\n");
        break;
    case RW:
        if (c)
            c->taken += in->length;
        if (in->to_port == OWN)
            on_control(data, in->length);
        else if (in->to_port == SESSIONS)
            on_session(in, data, in->length);
        else {
            struct request request = *(struct request *)data;
            u64 answer = perform(&request);
            send(in, RW, &answer, sizeof answer);
            if (request.op == HALT || on_reset == STOP_AFTER_REQUEST + 16)
                halt();
        }
        break;
    case RST:
        if (in->to_port == OWN) /* nobody listens yet */
            send(&control, REQUEST, 0, 0);
        forget(in);
        break;
    case SHUTDOWN:
        send(in, RST, 0, 0);
        forget(in);
        break;
    case CREDIT_REQUEST:
        send(in, CREDIT_UPDATE, 0, 0);
        break;
    }
}

/* The transport was reset: all connections are gone. It happens at a snapshot, and after its loading. */
static void reset(void)
{
    print("R\n");
    for (u64 i = 0; i < 64; i++)
        connections[i].peer = connections[i].port = 0;
    main_session.to_port = 0;
    stopped = 0;
    switch (on_reset) {
    case STOP:
        halt();
        break;
    case STOP_AFTER_REQUEST:
        on_reset += 16; /* from now on */
        break;
    case ACT_AGENT:
        remember(&control);
        send(&control, REQUEST, 0, 0);
        break;
    }
}

__attribute__((used)) static void run(void)
{
    print("BOOT\n");
    map_memory();
    start_balloon();
    start_vsock();
    print("READY\n");
    for (;;) {
        __asm__ volatile("pause");
        int id = take(&events);
        if (id >= 0) { /* the only event there is: transport reset */
            offer(&events, id);
            notify(vsock, 2);
            reset();
        }
        id = take(&receive);
        if (id >= 0) {
            handle((struct header *)received[id]);
            offer(&receive, id);
            notify(vsock, 0);
        }
    }
}

__asm__(".globl _start\n"
        "_start:\n"
        "    cli\n"
        "    lea stack_end(%rip), %rsp\n"
        "    call run\n"
        ".bss\n"
        ".balign 16\n"
        "    .space 65536\n"
        "stack_end:\n"
        ".text\n");
