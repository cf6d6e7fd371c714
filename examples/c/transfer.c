/* One request in C: its KV goes from a prefill engine to a decode engine, either of which may be this program or
   Python.

     transfer send              listens, prints its address, sends request-1
     transfer receive ADDRESS   connects to a sender, receives request-1 and checks it

   Both need HETKV_SECRET_FILE, or the secret that the Python package makes for a user. The model has 4 layers of 2 KV
   heads; element e of token t, head h of layer l is l + t / 128 + h / 4 + e / 64 for keys, and its negative for values.
 */
#include <hetkv.h>
#include <stdio.h>
#include <stdlib.h>

enum { LAYERS = 4, HEADS = 2, CHANNELS = 64, TOKENS = 50, BLOCKS = 12, BLOCK_SIZE = 16 };

/* K and V of each layer: [block, token, head, channel]. */
static float memory[LAYERS][2][BLOCKS][BLOCK_SIZE][HEADS][CHANNELS];

static void check(hetkv_status status) {
  if (status == HETKV_OK) return;
  fprintf(stderr, "%s: %s\n", hetkv_status_name(status), hetkv_error());
  exit(1);
}

static hetkv_pool* make_pool(void) {
  const hetkv_segment segments[] = {{"k", HEADS, CHANNELS}, {"v", HEADS, CHANNELS}};
  hetkv_layer layers[LAYERS] = {{HETKV_KV, 0, 0, 0, 0, NULL}};
  hetkv_segment_memory parts[LAYERS][2];
  hetkv_layer_memory places[LAYERS];
  memset(parts, 0, sizeof parts);
  for (int layer = 0; layer < LAYERS; ++layer) {
    layers[layer].num_segments = 2;
    layers[layer].segments = segments;
    for (int kv = 0; kv < 2; ++kv) {
      hetkv_segment_memory* part = &parts[layer][kv];
      part->base = memory[layer][kv];
      part->dtype = HETKV_FLOAT32;
      part->block_stride = sizeof memory[0][0][0];
      part->token_stride = sizeof memory[0][0][0][0];
      part->head_stride = sizeof memory[0][0][0][0][0];
    }
    places[layer] = (hetkv_layer_memory){(uint32_t)layer, BLOCK_SIZE, BLOCKS, parts[layer]};
  }
  hetkv_pool_config config;
  HETKV_INIT(config);
  config.layers = layers;
  config.num_layers = LAYERS;
  config.memory = places;
  config.num_memory = LAYERS;
  hetkv_pool* pool = NULL;
  check(hetkv_pool_create(&config, &pool));
  return pool;
}

static float value(int layer, int kv, int token, int head, int channel) {
  const float key = (float)layer + (float)token / 128 + (float)head / 4 + (float)channel / 64;
  return kv == 0 ? key : -key;
}

static float* element(int layer, int kv, const int32_t* blocks, int token, int head, int channel) {
  return &memory[layer][kv][blocks[token / BLOCK_SIZE]][token % BLOCK_SIZE][head][channel];
}

int main(int argc, char** argv) {
  const int sends = argc == 2 && strcmp(argv[1], "send") == 0;
  if (!sends && !(argc == 3 && strcmp(argv[1], "receive") == 0)) {
    fprintf(stderr, "usage: %s send | receive ADDRESS\n", argv[0]);
    return 2;
  }
  hetkv_pool* pool = make_pool();
  hetkv_node_config config;
  HETKV_INIT(config);
  config.instance = sends ? "prefill-0" : "decode-0";
  hetkv_node* node = NULL;
  check(sends ? hetkv_sender_create(pool, &config, &node) : hetkv_receiver_create(pool, &config, &node));

  const int32_t blocks[] = {7, 2, 11, 0};
  const hetkv_blocks group = {blocks, 4, TOKENS, 0};
  hetkv_request_config what;
  HETKV_INIT(what);
  what.id = "request-1";
  what.groups = &group;
  what.num_groups = 1;
  hetkv_request* request = NULL;
  int wrong = 0;

  if (sends) {
    char address[64];
    check(hetkv_listen(node, "127.0.0.1:0", address, sizeof address));
    printf("%s\n", address);
    fflush(stdout);
    check(hetkv_send(node, &what, &request));
    for (int layer = 0; layer < LAYERS; ++layer) { /* in place of the model */
      for (int kv = 0; kv < 2; ++kv)
        for (int token = 0; token < TOKENS; ++token)
          for (int head = 0; head < HEADS; ++head)
            for (int channel = 0; channel < CHANNELS; ++channel)
              *element(layer, kv, blocks, token, head, channel) = value(layer, kv, token, head, channel);
      check(hetkv_send_layer(request, (uint32_t)layer, 0, 0, NULL));
    }
    check(hetkv_wait(request, 60000));
  } else {
    check(hetkv_connect(node, argv[2]));
    check(hetkv_receive(node, &what, &request));
    check(hetkv_wait(request, 60000));
    for (int layer = 0; layer < LAYERS; ++layer)
      for (int kv = 0; kv < 2; ++kv)
        for (int token = 0; token < TOKENS; ++token)
          for (int head = 0; head < HEADS; ++head)
            for (int channel = 0; channel < CHANNELS; ++channel)
              wrong += *element(layer, kv, blocks, token, head, channel) != value(layer, kv, token, head, channel);
    if (wrong == 0) printf("arrived\n");
  }
  hetkv_request_free(request);
  hetkv_node_close(node);
  hetkv_pool_free(pool);
  return wrong != 0;
}
