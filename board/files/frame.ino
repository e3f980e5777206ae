// Classifies a frame of 160 x 120 pixels, RGB565, as a small camera gives it, and prints the class.

#include <$NAME.h>

static uint8_t frame[160 * 120 * 2];
static uint8_t pixels[${UPPER}_SIZE * ${UPPER}_SIZE * ${UPPER}_CHANNELS];
static float arena[${UPPER}_ARENA_BYTES / sizeof(float)];

void setup() { Serial.begin(115200); }

void loop() {
  // read the camera into `frame` here, by the library that it came with
  float logits[${UPPER}_CLASSES];
  if (${NAME}_frame(frame, 160, 120, ${UPPER}_RGB565, pixels) == 0)
    Serial.println(${NAME}_classes[${NAME}_run(pixels, logits, arena)]);
  delay(1000);
}
