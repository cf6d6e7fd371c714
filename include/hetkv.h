/* hetkv for C: pools, senders and receivers of KV cache, for engines that are not written in Python.

   A node of this library and one of the Python package talk to each other, in either direction, and each may listen or
   connect. docs/c-api.md is the guide, examples/c/ a program.

   Contracts
   - Every function may be called from any thread. Those that return hetkv_status return HETKV_OK or say in
     hetkv_error() what is wrong, in one line, until the thread's next call that fails.
   - Structures that a caller fills begin as zero. Those with `struct_bytes` take HETKV_INIT(structure), which notes
   their size as well: a library of another size rejects it by name. What they point to is read during the call and
   copied.
   - A pool's memory is the caller's. It stays allocated until the pool's nodes are closed.
   - Nothing here prints, ends the process, or takes a signal. */
#ifndef HETKV_H
#define HETKV_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HETKV_API __attribute__((visibility("default")))
#define HETKV_INIT(structure) (memset(&(structure), 0, sizeof(structure)), (structure).struct_bytes = sizeof(structure))

typedef enum hetkv_status {
  HETKV_OK = 0,
  HETKV_INPUT = 1,             /* an argument cannot be; nothing was changed */
  HETKV_MALFORMED = 2,         /* bytes that no version of the wire format allows */
  HETKV_UNSUPPORTED = 3,       /* what this build, device or peer cannot do */
  HETKV_AUTHENTICATION = 4,    /* the secrets differ, or a message was altered */
  HETKV_CHECKSUM = 5,          /* a payload is not what was packed */
  HETKV_PROTOCOL = 6,          /* the peer sent what the request does not allow */
  HETKV_PEER_LOST = 7,         /* the peer's process or network went, or nobody is connected */
  HETKV_LEASE_EXPIRED = 8,     /* not complete in time */
  HETKV_ABORTED = 9,           /* a side gave the request up */
  HETKV_TRANSPORT = 10,        /* a socket, shared memory or RDMA failed */
  HETKV_CLOSED = 11,           /* this side was closed */
  HETKV_CONTENT = 12,          /* the two sides mean other prompts by one id; nothing was sent */
  HETKV_DEVICE = 13,           /* a GPU or its driver rejected */
  HETKV_POOL_CHECKSUM = 14,    /* the pool does not hold what was unpacked */
  HETKV_TIMEOUT = 64,          /* the call's time is over; what it waited for goes on */
  HETKV_INCOMPATIBLE = 65,     /* the two sides do not fit; the text names the field and both values */
  HETKV_VERSION_MISMATCH = 66, /* the peer speaks another major version */
  HETKV_HANDSHAKE = 67,        /* what listens there is no peer */
  HETKV_MESSAGE = 68           /* a control message that cannot be read */
} hetkv_status;

typedef enum hetkv_dtype {
  HETKV_FLOAT32 = 1,
  HETKV_FLOAT16 = 2,
  HETKV_BFLOAT16 = 3,
  HETKV_FLOAT8_E4M3FN = 4,
  HETKV_FLOAT8_E4M3FNUZ = 5,
  HETKV_FLOAT8_E5M2 = 6,
  HETKV_FLOAT8_E5M2FNUZ = 7,
  HETKV_INT8 = 8,
  HETKV_UINT8 = 9 /* opaque bytes: moved, never converted */
} hetkv_dtype;

typedef enum hetkv_layer_kind {
  HETKV_KV = 0,     /* keys and values */
  HETKV_LATENT = 1, /* MLA: one head that every rank holds */
  HETKV_STATE = 2   /* one record of opaque bytes a request (Mamba and the like) */
} hetkv_layer_kind;

typedef struct hetkv_pool hetkv_pool;
typedef struct hetkv_node hetkv_node;       /* a sender or a receiver */
typedef struct hetkv_request hetkv_request; /* one request that a node sends or receives */

HETKV_API const char* hetkv_version(void);
HETKV_API const char* hetkv_error(void);
HETKV_API const char* hetkv_status_name(hetkv_status status);

/* --- the model, the same on both sides --- */

/* One part of a layer's cache, with all heads of the model: "k" and "v"; of MLA "latent" and "rope". */
typedef struct hetkv_segment {
  const char* name;
  uint32_t heads;
  uint32_t channels;
} hetkv_segment;

typedef struct hetkv_layer {
  hetkv_layer_kind kind;
  uint32_t group;          /* layers of one cache group share a block table */
  uint32_t sliding_window; /* in tokens; 0: none */
  uint32_t shares;         /* 1 + index of the layer whose cache this one reads; 0: its own */
  uint32_t num_segments;   /* at most 4 */
  const hetkv_segment* segments;
} hetkv_layer;

/* --- memory of one rank --- */

/* Where element (block, token, head, channel) of a segment is, in bytes from `base`:
     block * block_stride + token * token_stride + head * head_stride
       + (channel / pack) * pack_stride + (channel % pack) * channel_stride */
typedef struct hetkv_segment_memory {
  void* base;
  hetkv_dtype dtype;
  uint64_t block_stride;
  uint64_t token_stride;
  uint64_t head_stride;
  uint64_t channel_stride; /* 0: that of the dtype */
  uint64_t pack;           /* channels of one inner run; 0: all of them */
  uint64_t pack_stride;
  const double* scales; /* static: an element is its code times its scale */
  uint32_t num_scales;  /* 0: none, 1: of the segment, or one for each local head */
} hetkv_segment_memory;

typedef struct hetkv_layer_memory {
  uint32_t layer; /* of the model */
  uint32_t block_size;
  uint32_t num_blocks;
  const hetkv_segment_memory* segments; /* in the model's order */
} hetkv_layer_memory;

/* Rank `rank` of an instance of `tp x pp` ranks: number `pp_rank * tp + tp_rank`, split as hetkv.Shard.of says. */
typedef struct hetkv_pool_config {
  size_t struct_bytes;
  const hetkv_layer* layers;
  uint32_t num_layers;
  uint32_t tp, pp, rank; /* 0 ranks: 1 */
  const hetkv_layer_memory* memory;
  uint32_t num_memory; /* layers of this rank with a cache of their own */
  const char* device;  /* NULL or "cpu", "cuda:0", "hip:1" */
} hetkv_pool_config;

HETKV_API hetkv_status hetkv_pool_create(const hetkv_pool_config* config, hetkv_pool** pool);
HETKV_API void hetkv_pool_free(hetkv_pool* pool); /* nodes keep what they need of it */

/* --- nodes --- */

/* Zero stands for the default everywhere. */
typedef struct hetkv_node_config {
  size_t struct_bytes;
  const char* instance; /* name of the engine's instance */
  const void* secret;   /* shared by all instances, 16 bytes or more; NULL: the file that $HETKV_SECRET_FILE names, */
  size_t secret_bytes;  /* or the one that the Python package made for this user */
  uint64_t slot_bytes;
  uint64_t window_bytes; /* receiver: all slots together */
  uint32_t threads;
  uint32_t heartbeat_ms;
  uint32_t peer_timeout_ms;
  uint32_t lease_ms; /* receiver: a request must be complete within */
  uint32_t hold_ms;  /* sender: blocks are held for their tickets for */
  uint32_t handshake_timeout_ms;
  const char* const* fingerprint; /* name, value, name, value, ... of what made the KV; values of a name that both */
  uint32_t num_fingerprint;       /* sides have must be equal. Number of names */
  uint32_t verify_pool;           /* receiver: 1: read what was unpacked again from the pool (HETKV_POOL_CHECKSUM) */
  uint32_t isolate_peers;         /* receiver: 1: no two peers ever have the same memory as a slot; in host memory */
  const char* backends;           /* folder of the GPU backends; NULL: next to this library */
} hetkv_node_config;

HETKV_API hetkv_status hetkv_sender_create(const hetkv_pool* pool, const hetkv_node_config* config, hetkv_node** node);
HETKV_API hetkv_status hetkv_receiver_create(const hetkv_pool* pool, const hetkv_node_config* config,
                                             hetkv_node** node);
/* Ends all links and requests (HETKV_CLOSED), waits for the node's threads, and frees the node. Its requests stay valid
   for hetkv_wait and the like, until hetkv_request_free of each. */
HETKV_API void hetkv_node_close(hetkv_node* node);

/* Accepts peers at `host:port` (port 0: any free one), and writes the address to connect to, ended by a zero.
   `bound_bytes`: 64 or more. */
HETKV_API hetkv_status hetkv_listen(hetkv_node* node, const char* address, char* bound, size_t bound_bytes);
/* Connects to a listening rank, checks that the two sides fit, and links them. */
HETKV_API hetkv_status hetkv_connect(hetkv_node* node, const char* address);
/* The addresses of all ranks of an instance: those are linked that hold something of this pool. */
HETKV_API hetkv_status hetkv_connect_all(hetkv_node* node, const char* const* addresses, size_t count);
HETKV_API size_t hetkv_num_peers(hetkv_node* node);

/* --- requests --- */

/* Block ids of one cache group, in token order. */
typedef struct hetkv_blocks {
  const int32_t* ids;
  size_t num_ids;
  uint64_t num_tokens;        /* of the request; of a state group: 1 */
  uint64_t num_cached_tokens; /* receiver: that it has already; they are not sent */
} hetkv_blocks;

typedef struct hetkv_request_config {
  size_t struct_bytes;
  const char* id; /* the router's id of the request, the same on both sides */
  const hetkv_blocks* groups;
  uint32_t num_groups;
  const uint8_t* content; /* NULL, or 16 bytes that both sides must have alike (hetkv.content_digest) */
  const char* source;     /* receiver: the instance that sends; NULL: the only one that is linked */
  uint32_t limit_ms;      /* receiver: lease, sender: hold; 0: the node's */
  int32_t priority;       /* sender: lower ones leave first, on each link */
} hetkv_request_config;

/* Both return at once. */
HETKV_API hetkv_status hetkv_send(hetkv_node* sender, const hetkv_request_config* config, hetkv_request** request);
HETKV_API hetkv_status hetkv_receive(hetkv_node* receiver, const hetkv_request_config* config, hetkv_request** request);

/* Tokens [start, stop) of a layer are in the pool, or will be once what `stream` (cudaStream_t, hipStream_t) holds now
   has run; NULL for a pool in host memory. Returns in microseconds; may come before any receiver asks. The blocks must
   not change until hetkv_wait_packed. A `stop` of 0 means all tokens of the request. */
HETKV_API hetkv_status hetkv_send_layer(hetkv_request* request, uint32_t layer, uint64_t start, uint64_t stop,
                                        void* stream);
/* One call a layer for a whole step: tokens [starts[i], stops[i]) of requests[i], all of one sender. NULL arrays: all
   tokens of each. Where it fails nothing of any request was sent by it. */
HETKV_API hetkv_status hetkv_send_batch(hetkv_request* const* requests, size_t count, uint32_t layer,
                                        const uint64_t* starts, const uint64_t* stops, void* stream);

/* A time limit in ms: 0 looks and does not wait, a negative one waits for ever. Each returns the request's own failure,
   or HETKV_TIMEOUT. */
HETKV_API hetkv_status hetkv_wait(hetkv_request* request, int64_t timeout_ms);
HETKV_API hetkv_status hetkv_wait_layer(hetkv_request* request, uint32_t layer, int64_t timeout_ms); /* receiver */
HETKV_API hetkv_status hetkv_wait_packed(hetkv_request* request, int64_t timeout_ms); /* sender: blocks may be freed */
/* Requests of a node that have ended since the last call, well or not, at most `most`: for an engine's loop. Each is
   given once, is still the caller's to free, and is left out once it is freed. */
HETKV_API size_t hetkv_poll(hetkv_node* node, hetkv_request** requests, size_t most);
/* `reason` goes to the peer; NULL: none is given. */
HETKV_API void hetkv_abort(hetkv_request* request, const char* reason);
/* The request goes on; nobody hears of it any more. */
HETKV_API void hetkv_request_free(hetkv_request* request);

#ifdef __cplusplus
}
#endif
#endif
